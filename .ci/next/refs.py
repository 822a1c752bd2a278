import sys; sys.path.insert(0,'outputs/checkpoints')
from pathlib import Path
import judge as J, torch, os
torch.set_num_threads(1)
nb=J.notebook_setup(Path('/root/w/jr'))
for name in ('butterflies',):
    tr,held=J.training_images(name,Path('/root/w/data'),J.RECIPES[name])
    f=Path('/root/w/ref')/name; f.mkdir(parents=True,exist_ok=True)
    r=J.reference_of(nb,f,tr,held)
    old=nb.Reference(**J.load_file(Path('outputs/checkpoints')/name/'reference.safetensors'))
    print(name,len(tr),len(held),int(old.n_real),old.heldout.shape,(f/'reference.safetensors').stat().st_size/2**20)
    print(' mean', (r.mean-old.mean).abs().max().item(), r.mean.abs().max().item(),'cov',(r.cov-old.cov).abs().max().item(), 'held', (r.heldout.float()-old.heldout.float()).abs().max().item() if r.heldout.shape==old.heldout.shape else '-')
    print(' floors',r.floors[:, :2].tolist(), old.floors[:, :2].tolist(), 'self nearest held', r.nearest(r.heldout).mean().item(), flush=True)
