"""What may be installed: pure checks on metadata whose signatures have been verified already."""
