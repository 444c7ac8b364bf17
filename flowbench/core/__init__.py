"""The ground under everything: places, files, checks. It imports nothing else of flowbench."""
