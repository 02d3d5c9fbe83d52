"""What docs/ is made with: the site, and the picture of the README."""
