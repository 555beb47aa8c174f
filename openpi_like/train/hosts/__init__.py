"""The processes of a run: how they find each other, agree, watch each other, stop together."""
