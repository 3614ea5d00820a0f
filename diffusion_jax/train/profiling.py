"""placeholder until merged"""
class ProfilerWindow:
  def __init__(self, *a): pass
  def before(self, step): pass
  def close(self): pass
