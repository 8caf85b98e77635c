"""What an operator does, with keys that never leave the operator: make bundles, sign, push, renew."""
