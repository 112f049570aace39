"""Moving page bytes: `plan` says which runs, `host` and `device` copy them."""
