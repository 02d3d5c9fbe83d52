"""Commands of detection: parsers and mains, which import what they need when they run."""
