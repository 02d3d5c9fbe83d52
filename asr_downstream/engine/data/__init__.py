"""Images: where they come from, which comes when, and how they are changed."""
