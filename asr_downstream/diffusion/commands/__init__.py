"""Commands of diffusion models: parsers and mains, which import what they need when they run."""
