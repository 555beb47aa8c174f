"""Frames in tests are drawn without OpenGL, which cannot live in one process with the TensorFlow of other tests."""

import os

os.environ.setdefault("OPENPI_LIKE_RENDERER", "raycast")
