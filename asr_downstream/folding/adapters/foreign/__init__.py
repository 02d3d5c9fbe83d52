"""Adapters of other libraries, where they are scales of channels: read, and converted to files of this one."""
