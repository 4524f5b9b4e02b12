"""The Python API; `import distft` offers its names. The commands of `distft` are built on the same functions."""
