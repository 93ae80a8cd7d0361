# Semantics of upstream's 1.7.0; the local label tells this library apart.
__version__ = "1.7.0+portable.3"
