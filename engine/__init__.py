"""What makes runs fast and safe: attention, head, sampling, devices, weights, run folders. Nothing of the method."""
