"""netorch: one TOML file becomes a running QEMU network lab, and goes away without a trace."""

__version__ = "0.1.0"
