"""`leanserve bench ...`: what this machine does, every figure beside a peer's and beside the machine's own limit.

commands            the command line; imports nothing heavy
engine              the grid of `bench engine`, measured cell by cell, every system in turn
  task                what is measured, what comes back, and when a measurement is long enough
  system              a system under measurement: its processes, asked for one task at a time
  leanserve_ranks       ours, on any number of ranks
  transformers_peer     transformers' generate
  random_model        the checkpoint that all of them load
  floor               what a decode step cannot do without reading
  machine             where it ran, and how fast its memory can be read
gpu                 decode on one GPU, with graphs and without, and what must be the same
gpu_report          its figures and checks; JSON and the table
prefill             `bench prefill`: the same systems at long prompts, and
  waits               what others wait beside a long prefill, with the bundled model
  host_cost           what the engine costs where nothing is computed
  prefill_report      its figures
multigpu            `bench multigpu`: parity and scaling over GPUs
report              figures, ratios and the target; JSON and the table
plot                the same as a picture
"""
