"""The steps between a verified manifest and a version in the store: plan, fetch, patch, verify, stage, gate."""
