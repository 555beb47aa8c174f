"""What is seen of a run: metrics, trackers, pictures, bad steps, profiles."""
