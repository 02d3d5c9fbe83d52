"""Gates of a site: their attention, own or shared, and the state that runs along the sites."""
