from .cluster import check_resources as check_resources
from .cluster import check_storage as check_storage
from .cluster import check_travels as check_travels
from .cluster import check_workers as check_workers
from .cluster import connect as connect
from .training import RayLauncher as RayLauncher
