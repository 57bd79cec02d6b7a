"""The Program: nodes, dialect, sizes, and how two captures become one."""
