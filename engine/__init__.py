"""What makes runs fast and safe: the output head, devices, weight files, run folders. Nothing of the method."""
