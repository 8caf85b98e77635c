"""Generated from `proto/nearcast/wire/v1`. Do not edit: see `proto/README.md`."""
