"""The bank: constant gates of many sites, computed together before the first layer runs."""
