"""Where source tables come from: official archives, fetched and checked, and the simulator."""
