"""What is known of the classes of libraries that have no adapter here. Data, read without these libraries.

One module a library, named in `asr_downstream.registry.FRAMEWORKS`.
"""
