"""The ground: errors, names, files. Imports nothing else of lorakit."""
