"""One compute thread for every test here: with more, any busy neighbour makes small products crawl. Test process."""

import torch

torch.set_num_threads(1)
