"""FID and KID of runs, their tables and pictures."""
