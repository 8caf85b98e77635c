"""nearcast: an inference mesh. The kernel; it depends on no application. Import what you need from its modules."""

__version__ = "0.1.0"
