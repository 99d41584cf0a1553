from tests import tiny
from tests.ranks import run_on_ranks


def train_on_rank(job, argv):
    from dpa_ds.config_loader import load_config
    from dpa_ds.train import train
    train(load_config(argv), job)
    return job.launch.global_rank


def test_x(tmp_path):
    m = tiny.make_model(tmp_path/"m"); d = tiny.make_federation(tmp_path/"d")
    assert run_on_ranks(train_on_rank, 4, tmp_path, tiny.recipe(m, d, tmp_path/"r")) == [0,1,2,3]
    assert run_on_ranks(train_on_rank, 2, tmp_path, tiny.recipe(m, d, tmp_path/"r2", engine__deepspeed_config="ds_configs/zero3.json", cluster__ranks_per_group=2)) == [0,1]
