"""Runs planned ahead of time: published peaks, FLOPs, compiled programs and what they cost."""
