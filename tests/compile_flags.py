"""How programs are compiled in tests, which call most functions once."""

# In a fourth of the time. What users run, optimised, is what test_pulse.py kills and resumes.
IN_A_HURRY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
