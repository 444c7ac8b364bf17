"""Probability paths: how a source point becomes a data point, and at which velocity.

Every path is affine in source, data and (if it has any) noise of its own, ``x_t = alpha(t) x1 + sigma(t) x0 +
gamma(t) noise``, with its time derivative at fixed ends and noise as the target velocity (Lipman et al. 2023, arXiv
2210.02747; Albergo and Vanden-Eijnden 2023, arXiv 2209.15571). Time runs 0 = source, 1 = data.
"""
