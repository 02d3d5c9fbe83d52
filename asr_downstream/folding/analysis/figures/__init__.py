"""What the analyses draw, as SVG and PNG."""
