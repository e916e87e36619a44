"""GeoDistill: distil a large remote-sensing multimodal teacher into a small student on Ray."""

__version__ = "0.1.0"
