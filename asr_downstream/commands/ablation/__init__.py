"""Arms of an experiment: trained side by side over several seeds, and compared seed by seed."""
