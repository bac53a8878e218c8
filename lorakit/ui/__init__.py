"""The front end in the browser: it reads and writes the run folder and starts processes; it trains nothing itself."""
