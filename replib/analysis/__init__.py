"""What activations show: geometry, divergence, probes, logit lens."""
