"""From RLDS on disk to batches for the policy, and back to RLDS."""
