"""The locked base of every config. A recipe takes it, states its task and changes what differs."""

from ml_collections import ConfigDict


def base(task: str) -> ConfigDict:
  """Settings that all tasks share; units stand in the names of the keys."""
  config = ConfigDict()
  config.task = task
  config.dtype = 'float32'
  config.remat = 'none'
  config.attention = 'auto'
  config.products = 'plain'
  config.weights_from = ''
  config.data = ConfigDict(
    {'dataset': 'openmoji', 'size': 64, 'data_dir': '', 'prepare': True, 'test_fraction': 0.1,
     'transforms': (), 'workers': 2, 'most_unreadable': 0.5}
  )
  config.optimizer = ConfigDict({
    'learning_rate': 1e-4, 'schedule': 'cosine', 'warmup_steps': 100, 'final_fraction': 0.0,
    'b1': 0.9, 'b2': 0.99, 'eps': 1e-8, 'weight_decay': 0.01, 'clip_norm': 1.0, 'groups': (),
  })
  config.loop = ConfigDict({
    'total_steps': 1000, 'batch_size': 64, 'accumulation_steps': 1, 'seed': 0,
    'ema_halflife_images': 0.0, 'log_every_steps': 20, 'checkpoint_every_steps': 500,
    'keep_checkpoints': 2, 'keep_every_steps': 0, 'keep_best': '', 'keep_best_is': 'lowest',
    'sample_every_steps': 500, 'evaluate_every_steps': 0, 'evaluate_samples': 256,
    'evaluate_seconds': 0.0,
    'profile_first_step': 0, 'profile_steps': 5, 'wandb_project': '',
  })
  config.safety = ConfigDict({
    'max_skipped_in_a_row': 10, 'spike_deviations': 0.0, 'step_timeout_seconds': 1800.0,
    'compile_timeout_seconds': 7200.0, 'peer_timeout_seconds': 60.0,
    'checkpoint_retry_seconds': 60.0, 'room_timeout_seconds': 86_400.0,
  })
  config.mesh = ConfigDict({
    'data': -1, 'fsdp': 1, 'tensor': 1, 'spatial': 1, 'dcn_data': -1, 'dcn_fsdp': 1,
  })
  return config.lock()
