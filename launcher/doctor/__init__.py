"""ghostmask doctor: before a long job, would it run on these ranks, and how long would it take?"""
