"""The versions on disk: immutable folders, and one small pointer file per model."""
