import sys; sys.path.insert(0,'outputs/checkpoints')
import train as T, pyarrow.parquet as pq, pyarrow as pa, torch
from pathlib import Path
t=pq.read_table('/work/shared/data/butterflies.parquet')
bg=t['background'].to_pylist()
rows=[k for k,b in enumerate(bg) if b in ('plain','light')]
order=torch.randperm(len(rows),generator=torch.Generator().manual_seed(0))
held={rows[k] for k in order[:min(512,len(rows)//5)].tolist()}
plain=[k for k in rows if bg[k]=='plain']
new=t.take(plain).append_column('split',pa.array(['test' if k in held else 'train' for k in plain]))
Path('/root/w/data/butterflies.parquet').unlink(missing_ok=True)
pq.write_table(new,'/root/w/data/butterflies.parquet')
print(len(rows),len(held),len(plain),sum(k in held for k in plain))
# check: old split's training images equal
r=T.RECIPES['butterflies']; tr,he=T.training_images('butterflies',Path('/work/shared/data'),r)
from dataclasses import replace
tr2,he2=T.training_images('butterflies',Path('/root/w/data'),replace(r,keep={'background':('plain',)}))
s={x.numpy().tobytes() for x in tr}; h={x.numpy().tobytes() for x in he}
print(len(tr2),len(he2),all(x.numpy().tobytes() in s for x in tr2),all(x.numpy().tobytes() in h for x in he2))
from PIL import Image
lights=[k for k in rows if bg[k]=='light'][:32]; import io
im=[Image.open(io.BytesIO(t['image'][k].as_py()['bytes'])).resize((96,96)) for k in lights+plain[:32]]
g=Image.new('RGB',(96*16,96*4)); [g.paste(x,(96*(i%16),96*(i//16))) for i,x in enumerate(im)]; g.save('/root/w/bg.png')
