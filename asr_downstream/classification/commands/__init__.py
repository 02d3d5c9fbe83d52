"""Command of classification: parser and main, which import what they need when they run."""
