"""What benchmarks/torture.py does to vspdf: kills, faults, power cuts, damage, hostile files and long use."""
