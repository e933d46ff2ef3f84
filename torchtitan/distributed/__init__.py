"""Process groups and meshes; knows nothing of models."""
