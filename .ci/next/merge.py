"""merge.py RUNDIR: copy an executed run (RUNDIR/notebook.ipynb, results, figures) over the record of /work/main."""
import csv, json, shutil, sys
from pathlib import Path
run, main = Path(sys.argv[1]), Path('/work/main')
done = {c['id']: c for c in json.loads((run/'notebook.ipynb').read_text())['cells']}
path = main/'hw.diffusion.ipynb'; nb = json.loads(path.read_text())
for c in nb['cells']:
    if c['cell_type'] == 'code':
        d = done[c['id']]; assert ''.join(d['source']) == ''.join(c['source']), c['id']
        c['outputs'], c['execution_count'] = d['outputs'], d['execution_count']
path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n')
keep = {'training.csv', 'stock-study.csv', 'scale-study.csv', 'runs.csv'}
for f in (run/'results').iterdir():
    if f.name not in keep: shutil.copy(f, main/'outputs/results'/f.name)
new = list(csv.DictReader(open(run/'results/runs.csv'))); old = list(csv.DictReader(open(main/'outputs/results/runs.csv')))
names = {r['run'].split('/')[0] for r in new}
used = set()
for f in ('training.csv','stock-study.csv','scale-study.csv'):
    used |= {r['run'] for r in csv.DictReader(open(main/'outputs/results'/f))}
kept = [r for r in old if r['run'] in used and r['run'] not in {x['run'] for x in new}]
print('kept runs', [r['run'] for r in kept]); print('dropped', [r['run'] for r in old if r not in kept])
with open(main/'outputs/results/runs.csv', 'w', newline='') as f:
    w = csv.DictWriter(f, old[0].keys(), lineterminator='\n'); w.writeheader(); w.writerows(kept + new)
figs = {f.name for f in (run/'figures').iterdir()}
for f in (main/'outputs/figures').iterdir():
    if f.name not in figs: print('figure gone', f.name); f.unlink()
for f in (run/'figures').iterdir(): shutil.copy(f, main/'outputs/figures'/f.name)
