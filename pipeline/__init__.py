"""headcast's library: from a video of one person to a head avatar that can be driven. Knows no Prefect."""

__version__ = "0.1.0"
