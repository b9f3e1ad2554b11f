"""Temporary: forwards to support/ while files move. Deleted at the end of the move."""
from support.command import *  # noqa
from support.command import one_line, UserError, user_errors, run_script, _number, positive_int, batch_int, workers_int, seed_int, not_negative_int, positive_float, not_negative, fraction, share_above_zero, Help, pick_device, autocast_dtype, StatusLine  # noqa
from support.seeds import *  # noqa
from support.seeds import step_seed  # noqa
from support.ranks import *  # noqa
from support.ranks import join_ranks, ranks, rank, all_ranks  # noqa
from support.files import *  # noqa
from support.files import CHECKPOINT_VERSION, make_folder, next_folder, atomic_file, save_atomic, write_text_atomic, write_csv, append_jsonl, read_jsonl, load_checkpoint, resolve_checkpoint  # noqa
from support.pictures import *  # noqa
from support.pictures import COLOURS, to_picture as _to_picture, save_png, save_grid, line_chart  # noqa
from support.images import *  # noqa
from support.images import IMAGE_FORMATS, IMAGE_SUFFIXES, load_image, list_images  # noqa
from support.datasets import *  # noqa
from support.datasets import TUMOUR, CACHE_BYTES, ImageSet, open_dataset  # noqa
from support.tables import labels_of  # noqa
from support.files import read_csv as read_table  # noqa
from support.splits import *  # noqa
from support.splits import image_groups, split_holdout, write_split, read_split, find_outliers  # noqa
