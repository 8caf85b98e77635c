"""The cloud core: large models and room for what the edge cannot take."""
