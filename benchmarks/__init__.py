"""What rankwise promises about speed, measured: `make bench`."""
