"""Flow maps: average velocities between two times, how they are learned and how samples jump along them."""
